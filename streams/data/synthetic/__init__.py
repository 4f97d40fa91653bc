"""The quickstart's clips and questions."""
