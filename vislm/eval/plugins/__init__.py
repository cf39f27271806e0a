"""Models of this package inside other people's evaluation harnesses. Nothing here is imported by the rest."""
