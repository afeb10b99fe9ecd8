"""Reports: report.json for programs, report.html for people, tables and clips for both."""
