"""The gate: may a challenger replace the champion? `run` gathers its input from a store, `decide` compares."""

from cluster.gate.contenders import Contender, Slice
from cluster.gate.decide import decide
from cluster.gate.report import Check, GateReport, SliceReport, Verdict

__all__ = ["Check", "Contender", "GateReport", "Slice", "SliceReport", "Verdict", "decide"]
