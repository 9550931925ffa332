"""What the user did wrong, said in one line that names the field and the value and says what to do.

Everything else that is raised is a crash: a traceback, exit code 70, and a launcher may start it again.
"""

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
