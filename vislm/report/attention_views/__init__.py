"""What an attention in a vision model attends to, for one patch: arrays on the patch grid, and their pictures.

:func:`vislm.report.attention_views.figure.attention_figure` draws; the other modules hold one attention's view each.
"""

from __future__ import annotations

from vislm.report.attention_views.capture import at_layer, find_layer
from vislm.report.attention_views.panel import Layer, Panel
from vislm.report.attention_views.views import VIEWS, panels_of

__all__ = ["VIEWS", "Layer", "Panel", "at_layer", "find_layer", "panels_of"]
