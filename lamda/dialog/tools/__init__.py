"""TS, the toolset of section 6.2 of the paper: calculator, translator, information retrieval."""
