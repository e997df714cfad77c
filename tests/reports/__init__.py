"""The rows of the two reports: trained by `python -m tests.reports`, shown by `python -m tests.reports.page`."""
