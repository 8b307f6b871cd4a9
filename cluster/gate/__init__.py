"""The gate: may a challenger answer instead of the champion? It reads no data, trains and serves nothing."""

from cluster.gate.contenders import Contender, Slice
from cluster.gate.decide import decide
from cluster.gate.report import Check, GateReport, SliceReport, Verdict

__all__ = ["Check", "Contender", "GateReport", "Slice", "SliceReport", "Verdict", "decide"]
