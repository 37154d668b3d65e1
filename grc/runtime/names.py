"""What a served model may be called: its name is a folder of a repository and a part of a URL."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RULE = "letters and digits of ASCII, '.', '_' and '-', the first a letter or a digit"
