"""A row -> a dialogue."""
from finetuner.dialogue.message import Dialogue, Document, Row

def openai(row: Row) -> Dialogue: raise AssertionError
def alpaca(row: Row) -> Dialogue: raise AssertionError
def sharegpt(row: Row) -> Dialogue: raise AssertionError
def conversation(row: Row) -> Dialogue: raise AssertionError
def text(row: Row) -> Document: raise AssertionError
