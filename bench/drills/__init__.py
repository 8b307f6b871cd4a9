"""Long runs that kill, overload or disconnect real processes and check what is left."""
