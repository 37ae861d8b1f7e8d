"""A few passages, and a query whose best one shares no word with it."""

TEXTS = {
    "join": "Join one or more path segments intelligently.",
    "split": "Split a pathname into directory and file name.",
    "sleep": "Suspend execution of the calling thread for the given number of seconds.",
    "dumps": "Serialise an object to a JSON formatted string.",
    "median": "Return the median of numeric data, using the mean of middle two.",
    "shuffle": "Shuffle a list in place, at random.",
    "socket": "Open a network connection to a host and port.",
    "regex": "Compile a regular expression pattern into an object.",
}
QUERY = "how to combine two directory names"
