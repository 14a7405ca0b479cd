"""Names `tests/fixtures.py` as the plugin with all fixtures.

They cannot stand here: pytest offers a conftest's fixtures only below its own folder, and `test_retune.py`,
above it, shares the encoder, the data and the finished run, and names the same plugin.
"""

pytest_plugins = ["tests.fixtures"]
