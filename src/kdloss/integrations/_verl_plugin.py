"""What verl loads as a plug-in while it is imported: its losses are registered then, in every process.

Imported by anything else, it does nothing.
"""

import sys

from .verl import register

if "verl" in sys.modules:
    register()
