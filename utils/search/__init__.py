"""Search one's own videos: an index of folders, sentences in, moments out (see README.md)."""

from utils import SearchError
from utils.search.hits import Hit, Moment, Results, Video
from utils.search.video_index import VideoIndex

__all__ = ["Hit", "Moment", "Results", "SearchError", "Video", "VideoIndex"]
