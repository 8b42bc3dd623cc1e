"""A finished run on its way to others: exports, their proof, the Hub."""
