"""Reading of screens, by upstream's names: not there yet."""

from pathlib import Path
from typing import NoReturn

from firn.errors import MachineError

NO_OCR = "OCR requested but enableOCR is false, and firn's machines have no screen yet"


def perform_ocr_on_screenshot(screenshot_path: Path) -> NoReturn:
    """Say that there is none."""
    raise MachineError(f"{screenshot_path}: {NO_OCR}")


def perform_ocr_variants_on_screenshot(screenshot_path: Path, variants: bool = True) -> NoReturn:
    """Say that there is none."""
    del variants
    raise MachineError(f"{screenshot_path}: {NO_OCR}")


__all__ = ["perform_ocr_on_screenshot", "perform_ocr_variants_on_screenshot"]
