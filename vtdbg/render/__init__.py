"""How a report is shown: text for consoles, JSON for programs, HTML and DML for what can be clicked."""
