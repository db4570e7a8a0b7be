"""The keys of an American keyboard by the characters that they type, as QEMU names keys."""

import string

#: Characters of keys whose names differ with the layout: plain, and with shift, by scan code.
_CODES = {
    0x0C: "-_",
    0x0D: "=+",
    0x1A: "[{",
    0x1B: "]}",
    0x27: ";:",
    0x28: "'\"",
    0x29: "`~",
    0x2B: "\\|",
    0x33: ",<",
    0x34: ".>",
    0x35: "/?",
}

#: The key, or keys, for each character that is not itself a key's name.
CHAR_TO_KEY: dict[str, str] = {
    **{upper: f"shift-{upper.lower()}" for upper in string.ascii_uppercase},
    **{both[0]: f"0x{code:02X}" for code, both in _CODES.items()},
    **{both[1]: f"shift-0x{code:02X}" for code, both in _CODES.items()},
    # The digits' keys have the codes from 2 on.
    **{shifted: f"shift-0x{code:02X}" for code, shifted in enumerate("!@#$%^&*()", 2)},
    " ": "spc",
    "\n": "ret",
}
