import pytest
from questions import tiny


@pytest.fixture(scope="session")
def llada():
  return tiny()
