"""What stands in the pages: fenced blocks, commands, links. Of README, CONTRIBUTING, CHANGELOG, launch/ and docs/."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
  str(path.relative_to(ROOT)): path.read_text("utf-8")
  for path in (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
  )
}
_FENCED = re.compile(r"^(```+)([^\n]*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
_STARTS = re.compile(
  r"(?:[A-Z_]+=\S+ )*(?:pip install|lladax --|python3? |pytest|benchmarks/\w+\.sh|launch/\w+\.sh|sbatch|gcloud|kubectl"
  r"|sphinx-build|ruff |deno |curl |\.ci/run|docker |xpk |tail |scancel |export \w+=)"
)


def blocks(text):
  """[(language and marks, code)] of the fenced blocks of a page."""
  return [(info, code) for _, info, code in _FENCED.findall(text)]


def shell(text):
  """The shell's blocks of a page, without what a command is handed to read, and without what goes round it."""
  found = "\n".join(code for info, code in blocks(text) if info == "bash")
  found = re.sub(r"(<<'END')\n.*?^END$", r"\1", found, flags=re.MULTILINE | re.DOTALL)
  return re.sub(r"^(?:for .*; do|done)$", "", found, flags=re.MULTILINE)


def inline(text):
  """What stands between backticks outside of blocks."""
  return re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))


def lines(text):
  """Lines of the shell, those that go on joined."""
  return text.replace("\\\n", " ").splitlines()


def commands(text):
  """The shell's commands in a text, on one line each, without their comments."""
  found = [re.sub(r"\s+", " ", re.split(r"(?:^|\s)# ", line)[0]).strip() for line in lines(text)]
  return [line for line in found if _STARTS.match(line)]


def links(text):
  """The targets of a page's links and pictures."""
  return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", _FENCED.sub("", text)))


def anchors(text):
  """What a link to a heading of a page may be called, as GitHub does it."""
  headings = re.findall(r"^#+ (.+?)\s*$", _FENCED.sub("", text), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
