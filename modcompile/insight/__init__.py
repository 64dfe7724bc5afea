"""What the routers of a model do on a text: measured, and written as one HTML page that needs nothing beside it."""

__all__ = ["Insight", "Passage", "measure", "read_passages", "render", "write_page"]

from modcompile.insight.figures import Insight
from modcompile.insight.measure import measure
from modcompile.insight.page import render, write_page
from modcompile.insight.passages import Passage, read_passages
