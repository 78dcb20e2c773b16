"""Files that appear whole or not at all, files that grow by whole lines, and the records of failures."""
