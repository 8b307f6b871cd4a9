"""API keys and the callers they identify."""
