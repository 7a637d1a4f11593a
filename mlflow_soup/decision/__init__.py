"""The decision whether a soup may be promoted: paired statistics, and the gate."""
