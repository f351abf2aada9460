"""The page as Gradio shows it. Nothing of it asks for anything that is not on this machine."""

import os
import socket
import threading

from flowdcn_jax.demo.page import FIRST, Field, Page
from flowdcn_jax.errors import UserError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise UserError(
        "the page needs Gradio, which is not installed; pip install 'gradio>=6', or this package "
        "with the extra demo"
    ) from error

FONT, FIXED_FONT = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the reader's own


def build(page: Page) -> gr.Blocks:
    """The page's components; one request is served at a time, and others wait."""
    with gr.Blocks(title="FlowDCN", analytics_enabled=False) as blocks:
        gr.Markdown(f"# FlowDCN\n{page.title}")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                fields = page.fields()
                inputs = [_component(field) for field in fields[: len(FIRST)]]
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Accordion("More", open=False):
                    inputs += [_component(field) for field in fields[len(FIRST) :]]
            with gr.Column(scale=2, min_width=320):
                text = gr.Textbox(label="Answer", interactive=False, elem_id="answer", max_lines=8)
                pictures = []
                for name, title in (("grid", "Images"), ("strip", "From noise to image")):
                    gr.Markdown(f"### {title}")
                    pictures.append(
                        gr.Image(
                            elem_id=name,
                            alt_text=title,
                            format="png",
                            interactive=False,
                            show_label=False,
                            buttons=["download", "fullscreen"],
                        )
                    )
                command = gr.Textbox(
                    label="The same images from the command line",
                    interactive=False,
                    elem_id="command",
                    buttons=["copy"],
                )

        def answer(*values):
            answered = page.answer(
                {field.option.name: value for field, value in zip(fields, values, strict=True)}
            )
            return answered.text, answered.grid, answered.strip, answered.command

        outputs = [text, *pictures, command]
        draw.click(answer, inputs, outputs, concurrency_limit=1, api_name=False)
    return blocks.queue(default_concurrency_limit=1, api_open=False)


def _component(field: Field):
    """What a value is entered with. Ranges are not told to Gradio: the page answers itself."""
    option = field.option
    shared = dict(label=option.name, info=field.help, value=field.value, elem_id=option.name)
    if field.choices is not None:
        return gr.Dropdown(
            field.choices,
            multiselect=field.several,
            allow_custom_value=not field.closed,
            **shared,
        )
    if option.type is bool:
        return gr.Checkbox(**shared)
    if option.type in (int, float):
        return gr.Number(**shared)
    return gr.Textbox(**shared)


def start(page: Page, *, host: str, port: int) -> tuple[gr.Blocks, str]:
    """Shows the page from now on: (what can be closed, its address).

    Raises:
        UserError: the address cannot be listened at.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        why = error.strerror.partition(" (")[0]  # Python adds the address once more
        raise UserError(
            f"--host={host} and --port={port} cannot be listened at: {why}; expected an address of "
            "this machine and a free port"
        ) from error
    blocks = build(page)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(font=FONT, font_mono=FIXED_FONT),
    )
    return blocks, address


def serve(page: Page, *, host: str, port: int) -> None:
    """Shows the page until it is interrupted; prints its address.

    Raises:
        UserError: see `start`.
    """
    blocks, address = start(page, host=host, port=port)
    print(address, flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
