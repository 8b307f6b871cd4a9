"""Why a network answered as it did: maps over the image, as pure functions.

`closed_form` computes Grad-CAM of all classes in the forward batch, with no backward pass;
`gradients` holds the methods that differentiate; `overlay` draws a map over its image.
Nothing here leaves a hook or any other state on a network, so threads may share one.
"""
