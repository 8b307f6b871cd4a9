"""Rollout of a candidate: shadow, canary with a traffic share, promotion, rollback by guardrails."""
