"""A page for people that draws with one model: its fields and answers, and Gradio's view of them.

`Page` needs no Gradio, `build` does; see `flowdcn_jax.tools.demo`.
"""

from flowdcn_jax.demo.page import Answer, Field, Page

__all__ = ["Answer", "Field", "Page"]
