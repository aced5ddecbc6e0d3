"""Pictures in a window, where this machine can show one."""

import os
import sys

import cv2
import numpy as np

QUIT_KEYS = (ord("q"), 27)  # 27: Esc


def why_no_window() -> str | None:
    """Why no window can be shown here, or None."""
    if sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return "there is no display"
    if not cv2.currentUIFramework():
        return "this OpenCV is built without windows (replace it by opencv-python to have them)"
    return None


def show(title: str, picture: np.ndarray) -> bool:
    """Show uint8 [H, W, 3] RGB until a key is pressed; False for q, Esc or a closed window."""
    cv2.imshow(title, picture[..., ::-1])
    while cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) >= 1:
        key = cv2.waitKey(50)
        if key != -1:
            return key & 0xFF not in QUIT_KEYS
    return False
