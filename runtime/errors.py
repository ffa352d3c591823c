"""What can go wrong, as one exception per documented exit code.

Every message is one sentence with what was seen, what was expected and what to do.
"""


class GlmExportError(Exception):
    """A failure the user can act on. Anything else that escapes is a bug (exit code 1)."""

    exit_code = 1


class UsageError(GlmExportError):
    """A wrong argument, option or recipe (2, as Click uses it)."""

    exit_code = 2


class InputError(GlmExportError):
    """A checkpoint, configuration, prompt or bundle that can not be used (3)."""

    exit_code = 3


class AccuracyError(GlmExportError):
    """An engine is further from the reference than its tolerance, or nothing was compared (4)."""

    exit_code = 4


class ResourceError(GlmExportError):
    """Not enough cache capacity, memory or disk (5)."""

    exit_code = 5


class BackendError(GlmExportError):
    """A library, driver or plugin that a target needs is missing (6)."""

    exit_code = 6


class LockedError(GlmExportError):
    """Another process is writing the same bundle (7)."""

    exit_code = 7


class IntegrityError(GlmExportError):
    """A bundle file is not what the manifest says, or a checkpoint changes while it is read (8)."""

    exit_code = 8


def missing_library(who: str, library: str, *, extra: str) -> BackendError:
    """What is raised where an optional dependency is not installed.

    Args:
        who: what needs it, as the subject of the sentence.
        library: the module that is not there.
        extra: the extra of this package that installs it.
    """
    return BackendError(f'{who} needs the library {library}: pip install "glm-export[{extra}]".')


def printable(text: str) -> str:
    """The text with all that is not printable escaped: names in files of others could hold a terminal's commands."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
