//! Dates of the proleptic Gregorian calendar.

/// A moment of UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) second: u8,
    pub(super) minute: u8,
    pub(super) hour: u8,
    /// 1 is Sunday. Not looked at by [`DateTime::to_unix`].
    pub(super) weekday: u8,
    pub(super) day: u8,
    pub(super) month: u8,
    pub(super) year: u32,
}

/// Days of 400 years.
const ERA: u64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const TO_EPOCH: u64 = 719_468;

impl DateTime {
    pub(super) fn from_unix(seconds: u64) -> Self {
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        // Years that start in March put the leap day at their end.
        let shifted = days + TO_EPOCH;
        let (era, day_of_era) = (shifted / ERA, shifted % ERA);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        Self {
            second: (of_day % 60) as u8,
            minute: (of_day / 60 % 60) as u8,
            hour: (of_day / 3600) as u8,
            weekday: ((days + 4) % 7) as u8 + 1,
            day: (day_of_year - (153 * from_march + 2) / 5) as u8 + 1,
            month: month as u8,
            year: (era * 400 + year_of_era) as u32 + u32::from(month <= 2),
        }
    }

    /// Seconds since 1970. Fields out of range are brought into range; before 1970 is 1970.
    pub(super) fn to_unix(self) -> u64 {
        let month = u64::from(self.month.clamp(1, 12));
        let day = u64::from(self.day.clamp(1, 31));
        let year = u64::from(self.year).max(1) - u64::from(month <= 2);
        let (era, year_of_era) = (year / 400, year % 400);
        let from_march = (month + 9) % 12;
        let day_of_year = (153 * from_march + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (era * ERA + day_of_era).saturating_sub(TO_EPOCH);
        let of_day =
            u64::from(self.hour % 24) * 3600 + u64::from(self.minute % 60) * 60 + u64::from(self.second % 60);
        days * 86_400 + of_day
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_six_centuries_converts_both_ways() {
        let mut last = DateTime::from_unix(0);
        assert_eq!((last.year, last.month, last.day, last.weekday), (1970, 1, 1, 5));
        for day in 1..220_000u64 {
            let date = DateTime::from_unix(day * 86_400 + 86_399);
            assert_eq!(date.to_unix(), day * 86_400 + 86_399);
            assert_eq!(date.weekday, last.weekday % 7 + 1);
            assert!(date.day == last.day + 1 || (date.day == 1 && last.day >= 28));
            last = date;
        }
        let leap = DateTime::from_unix(951_782_400);
        assert_eq!((leap.year, leap.month, leap.day), (2000, 2, 29));
    }
}
