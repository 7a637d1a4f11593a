"""Write reports, tables and figures from records."""
