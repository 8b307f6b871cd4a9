"""Maps over an image that show what a network's output depends on, as pure functions.

`closed_form` computes Grad-CAM of all classes in the forward batch, with no backward pass; `gradients` holds the
methods that differentiate or cover; `methods` registers them; `images.overlay` draws a map over its image. Nothing
here leaves a hook or any other state on a network, so threads may share one.
"""

# Here and not in `images.overlay`: settings and command line read them and must not import OpenCV and matplotlib.
STORED_OVERLAY_SIDE_PX = 224
"""Side of overlays drawn with a prediction. Larger ones cost measurable time in every request: at 224
px a JPEG of 450 rows is halved while it is decoded."""

FILE_OVERLAY_SIDE_PX = 512
"""Side of an overlay that a person asks for as a file."""
