"""What the user did wrong, said in one line that names the field and the value and says what to do.

What a disk refuses is one line, too: it would refuse it again. Everything else that is raised is a crash: a traceback,
exit code 70, and a launcher may start it again.
"""

import errno
import os
import re

from lladax.terminal import visible

_LONGEST = 2000  # characters; of a longer line the middle, which somebody else wrote, is left out


class Mistake(ValueError):
  """A mistake of the user's: one line, exit code 1; the same command would end the same way.

  The values that it quotes come from anywhere: what a terminal would obey in them is shown as escapes.
  """

  def __init__(self, message: object = ""):
    line = visible(str(message)).replace("\n", "␊")
    if len(line) > _LONGEST:
      line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    super().__init__(line)


class Missing(Mistake, FileNotFoundError):
  """What the user names is not there."""


class Unknown(Mistake, TypeError):
  """An option or a field that does not exist."""


class Diverged(Mistake, FloatingPointError):
  """The loss or its gradient is not a number: the run's settings are to blame."""


class Unsaved(Mistake, OSError):
  """The last step could not be saved: the disk is to blame, and would be again."""


_REFUSED = {
  getattr(errno, name)
  for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "EFBIG", "ENAMETOOLONG")
}


def refusal(error: BaseException | None) -> str:
  """What a file system refused, in one line; "" of an error of another kind.

  Args:
    error: it, or one that was raised from it; TensorStore's say the number in their text.
  """
  while error is not None:
    if isinstance(error, OSError) and error.errno in _REFUSED:
      why = os.strerror(error.errno or 0)
      return f"{os.fsdecode(error.filename)}: {why}" if error.filename else why
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
      return os.strerror(int(found[1]))
    error = error.__cause__
  return ""
