"""The web page (Gradio) with four tabs: Predict, History, Models and Rounds.

The page is a client of the REST API like any other, so it can do nothing that the API does not allow for the visitor's
key. Each tab is a module with its event handlers and its layout; HTML comes from the Jinja2 templates in `templates/`.
`layout.build_page` returns the Gradio app that `routes.page` mounts. The page loads nothing from other hosts, and
uploads are deleted after minutes.
"""
