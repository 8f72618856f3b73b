"""The rulers: exact rules that say how many parameters and operations a compressed network counts as."""
