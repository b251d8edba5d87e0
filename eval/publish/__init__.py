"""From the rows that measuring stored to tables, plots and a page, and to the list of what is missing."""
