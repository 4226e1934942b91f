//! What asks a container to stop, by the names and numbers that there are.

use oci::image::ContainerDefaults;
use oci::signal::{NAMES, REALTIME, parse};
use proto::runtime::v1::{ContainerConfig, Signal};

/// What is sent unless somebody says otherwise.
const SIGTERM: u32 = 15;

/// What StopContainer sends: what the container asks for, else what its image does, else SIGTERM. An image that names no
/// signal is asked to stop as one that names none: it can be stopped all the same.
pub fn stop_signal(container: &ContainerConfig, image: &ContainerDefaults) -> u32 {
    let own = Signal::try_from(container.stop_signal).ok().and_then(number);
    own.or_else(|| parse(&image.stop_signal)).unwrap_or(SIGTERM)
}

/// What ContainerStatus says of it.
pub fn reported(container: &ContainerConfig, number: u32) -> Signal {
    match Signal::try_from(container.stop_signal) {
        Ok(own) if own != Signal::RuntimeDefault => own,
        _ => name_of(number).unwrap_or(Signal::RuntimeDefault),
    }
}

/// `SIGRTMINPLUS3` is the CRI's name of what others call SIGRTMIN+3.
fn number(signal: Signal) -> Option<u32> {
    let name = signal.as_str_name().strip_prefix("SIGNAL_")?;
    parse(&name.replace("PLUS", "+").replace("MINUS", "-"))
}

fn name_of(number: u32) -> Option<Signal> {
    let (first, last) = REALTIME;
    let name = match number {
        number if number == first => "RTMIN".to_owned(),
        number if number == last => "RTMAX".to_owned(),
        35..=49 => format!("RTMINPLUS{}", number - first),
        50..=63 => format!("RTMAXMINUS{}", last - number),
        _ => NAMES.iter().find(|(_, of)| *of == number)?.0.to_owned(),
    };
    Signal::from_str_name(&format!("SIGNAL_SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(own: Signal, image: &str) -> u32 {
        let container = ContainerConfig { stop_signal: own as i32, ..ContainerConfig::default() };
        stop_signal(
            &container,
            &ContainerDefaults { stop_signal: image.into(), ..ContainerDefaults::default() },
        )
    }

    #[test]
    fn the_containers_signal_counts_before_its_images() {
        assert_eq!(with(Signal::Sigusr1, "SIGINT"), 10);
        assert_eq!(with(Signal::RuntimeDefault, "SIGINT"), 2);
        assert_eq!(with(Signal::RuntimeDefault, ""), 15);
        assert_eq!(with(Signal::RuntimeDefault, "nonsense"), 15);
        assert_eq!(with(Signal::Sigrtminplus3, ""), 37);
        assert_eq!(with(Signal::Sigrtmaxminus14, ""), 50);
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number_and_comes_back() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            let found = number(signal).unwrap_or_else(|| panic!("{signal:?} has no number"));
            let back = name_of(found).unwrap();
            assert_eq!(number(back), Some(found), "{signal:?}");
            let container = ContainerConfig { stop_signal: value, ..ContainerConfig::default() };
            assert_eq!(reported(&container, found), signal);
        }
        assert_eq!(reported(&ContainerConfig::default(), 2), Signal::Sigint);
        assert_eq!(reported(&ContainerConfig::default(), 15), Signal::Sigterm);
    }
}
