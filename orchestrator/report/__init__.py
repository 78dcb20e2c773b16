"""The report of a run: report.html, its charts and the files that it is made from."""
