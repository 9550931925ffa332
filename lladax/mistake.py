"""What the user did wrong, said in one line that names the field and the value and says what to do.

Everything else that is raised is a crash: a traceback, exit code 70, and a launcher may start it again.
"""


class Mistake(ValueError):
  """A mistake of the user's: one line, exit code 1; the same command would end the same way."""


class Missing(Mistake, FileNotFoundError):
  """What the user names is not there."""


class Unknown(Mistake, TypeError):
  """An option or a field that does not exist."""


class Diverged(Mistake, FloatingPointError):
  """The loss or its gradient is not a number: the run's settings are to blame."""
