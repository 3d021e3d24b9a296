//! Doubly linked lists of small numbers, without a node of their own: the links are an array, the numbers its
//! indices. A number is in at most one list of an array; taking it out needs no search and no memory.

/// No number.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    next: u32,
    previous: u32,
}

/// A list; its links are in a [`Links`].
#[derive(Clone, Copy)]
pub(super) struct List {
    first: u32,
    last: u32,
}

impl List {
    pub(super) const EMPTY: Self = Self { first: NONE, last: NONE };

    /// The number that was put in first.
    pub(super) fn first(&self) -> Option<u32> {
        (self.first != NONE).then_some(self.first)
    }
}

/// The links of all lists over one range of numbers.
pub(super) struct Links(Vec<Link>);

impl Links {
    pub(super) fn with_capacity(numbers: usize) -> Self {
        Self(Vec::with_capacity(numbers))
    }

    /// Makes room for the numbers below `count`.
    pub(super) fn grow(&mut self, count: usize) {
        if self.0.len() < count {
            self.0.resize(count, Link { next: NONE, previous: NONE });
        }
    }

    /// Puts `number`, which is in no list, at the end of `list`.
    pub(super) fn push(&mut self, list: &mut List, number: u32) {
        let last = list.last;
        if let Some(link) = self.0.get_mut(number as usize) {
            *link = Link { next: NONE, previous: last };
        } else {
            return;
        }
        match self.0.get_mut(last as usize) {
            Some(link) => link.next = number,
            None => list.first = number,
        }
        list.last = number;
    }

    /// Takes `number` out of `list`, where it is.
    pub(super) fn remove(&mut self, list: &mut List, number: u32) {
        let Some(&Link { next, previous }) = self.0.get(number as usize) else { return };
        match self.0.get_mut(previous as usize) {
            Some(link) => link.next = next,
            None => list.first = next,
        }
        match self.0.get_mut(next as usize) {
            Some(link) => link.previous = previous,
            None => list.last = previous,
        }
    }

    /// Takes the first number out of `list`.
    pub(super) fn pop(&mut self, list: &mut List) -> Option<u32> {
        let first = list.first()?;
        self.remove(list, first);
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(links: &mut Links, mut list: List) -> Vec<u32> {
        std::iter::from_fn(|| links.pop(&mut list)).collect()
    }

    #[test]
    fn numbers_come_out_in_order_and_can_leave_from_anywhere() {
        for gone in [0, 1, 2, 3] {
            let mut links = Links::with_capacity(4);
            links.grow(4);
            let mut list = List::EMPTY;
            for number in 0..4 {
                links.push(&mut list, number);
            }
            links.remove(&mut list, gone);
            let left: Vec<u32> = (0..4).filter(|n| *n != gone).collect();
            assert_eq!(numbers(&mut links, list), left);
        }
    }

    #[test]
    fn an_emptied_list_can_be_filled_again() {
        let mut links = Links::with_capacity(2);
        links.grow(2);
        let mut list = List::EMPTY;
        links.push(&mut list, 1);
        links.remove(&mut list, 1);
        assert_eq!(list.first(), None);
        links.push(&mut list, 1);
        links.push(&mut list, 0);
        assert_eq!(list.first(), Some(1));
        assert_eq!(numbers(&mut links, list), [1, 0]);
    }
}
