//! Runs a family's rules over a text, word by word, and writes where pieces end.

use crate::tokenizer::scan::leaf::{Instructions, Leaf, Work};
use crate::tokenizer::scan::parts::{NONE, View};
use crate::tokenizer::scan::word::{Groups, Reader, WORD, Word};

/// A family's rules with the state they carry from word to word.
pub(super) trait Rules: Copy {
    /// What the family makes of each class.
    fn groups(&self) -> &'static Groups;
    /// The bytes of the word at which pieces begin. `due` takes the start of a piece in an earlier word that is certain
    /// only now; it is before every start of this word and behind those of the words before.
    ///
    /// Bits beyond the end of the text do not matter, nor does the text's first.
    fn starts(&mut self, view: &View<'_>, due: &mut u32) -> u64;
}

/// A text, and how far it is scanned.
pub(super) struct Driver<'t, R> {
    state: State<'t, R>,
    instructions: Instructions,
}

#[derive(Clone, Copy)]
struct State<'t, R> {
    reader: Reader<'t>,
    rules: R,
    /// The word at `base`, once `begun`.
    word: Word,
    base: usize,
    begun: bool,
}

/// Positions one word can give: its bytes, one that was due, and the text's end.
pub(super) const MOST: usize = WORD + 2;

impl<'t, R: Rules> Driver<'t, R> {
    pub fn new(text: &'t str, rules: R, instructions: Instructions) -> Self {
        let reader = Reader::new(text, rules.groups());
        let state = State { reader, rules, word: Word::default(), base: 0, begun: false };
        Self { state, instructions }
    }

    /// As [`Cursor::fill`](super::Cursor::fill), for any N of at least [`MOST`].
    pub fn fill<const N: usize>(&mut self, ends: &mut [u32; N]) -> usize {
        const { assert!(N >= MOST) };
        self.instructions.run(Fill { state: &mut self.state, ends })
    }
}

struct Fill<'f, 't, R, const N: usize> {
    state: &'f mut State<'t, R>,
    ends: &'f mut [u32; N],
}

impl<R: Rules, const N: usize> Work for Fill<'_, '_, R, N> {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<L: Leaf>(self) -> usize {
        let mut state = *self.state; // in registers
        let len = state.reader.text.len();
        if !state.begun {
            state.begun = true;
            // SAFETY: the caller's promise.
            state.word = unsafe { state.reader.read::<L>(0) };
        }
        let mut count = 0;
        while state.base < len && count + MOST <= N {
            // SAFETY: the caller's promise.
            let next = unsafe { state.reader.read::<L>(state.base + WORD) };
            let view = View { text: state.reader.text, base: state.base, word: &state.word, next: &next };
            let mut due = NONE;
            let mut starts = state.rules.starts(&view, &mut due) & state.word.text;
            if state.base == 0 {
                starts &= !1;
            }
            if due != NONE {
                self.ends[count] = due;
                count += 1;
            }
            let room = self.ends[count..].first_chunk_mut().expect("MOST fit");
            // SAFETY: the caller's promise.
            unsafe { L::places(starts, state.base as u32, room) };
            count += starts.count_ones() as usize;
            state.word = next;
            state.base += WORD;
            if state.base >= len {
                self.ends[count] = len as u32;
                count += 1;
            }
        }
        *self.state = state;
        count
    }
}
