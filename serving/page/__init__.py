"""The web page (Gradio): ask, look, object, see what annotators said; models and rounds.

In: the address of the API, which it asks like any other caller, so the page can do nothing that the API does not
allow. Out: a Gradio layout, which `routes.page` mounts. Every tab is a module with its layout and its handlers; what
they show is made by the `*_html` modules. Nothing on the page comes from another host; uploads are deleted after
minutes.
"""
