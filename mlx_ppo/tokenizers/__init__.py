"""Text into tokens, and chats into text."""
