"""The page's colours, and its fonts, which every system has."""

import gradio as gr

ACCENT = "#0b6e6e"


def page_theme() -> gr.themes.Base:
    """Return the page's colours and its fonts, which every system has."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=sans, font_mono=mono)
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_hover="#095a5a",
        button_primary_background_fill_dark=ACCENT,
        checkbox_background_color_selected=ACCENT,
        checkbox_border_color_selected=ACCENT,
        slider_color=ACCENT,
    )
