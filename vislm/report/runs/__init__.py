"""Reports of evaluation runs: tables for papers, and a page with plots and a sample browser."""
