"""Reading of screens."""

from firn.machine.ocr import perform_ocr_on_screenshot, perform_ocr_variants_on_screenshot

__all__ = ["perform_ocr_on_screenshot", "perform_ocr_variants_on_screenshot"]
