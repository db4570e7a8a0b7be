"""OCR of picture files, under upstream's names; for screens use get_screen_text()."""

from os import PathLike

from firn._firn import read_picture


def perform_ocr_on_screenshot(screenshot_path: str | PathLike[str]) -> str:
    """Return the words in a picture.

    screenshot_path: a PNG or PPM file.

    Raises MachineError if `tesseract` is not in PATH or fails, and OSError for a file that cannot
    be read or is no picture.
    """
    return perform_ocr_variants_on_screenshot(screenshot_path, variants=False)[0]


def perform_ocr_variants_on_screenshot(
    screenshot_path: str | PathLike[str], variants: bool = True
) -> list[str]:
    """Read a picture in several ways, each of which may find other words.

    variants: whether to read also two pictures that are made of it for reading, of its dark letters
    and of its bright ones; without it the answer is one text.

    Raises as perform_ocr_on_screenshot() does.
    """
    return read_picture(screenshot_path, variants)


__all__ = ["perform_ocr_on_screenshot", "perform_ocr_variants_on_screenshot"]
