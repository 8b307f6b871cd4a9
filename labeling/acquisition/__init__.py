"""Acquisition: which images an expert's minute is best spent on. `registry` names the rules, `choose` applies one."""
