//! Makes the kernel hold what a file asks for.
//!
//! [`source`] reads the file, [`observe`] the kernel; [`plan`] is pure and lists the actions that lead from the one to
//! the other, and [`execute`] carries them out.

pub mod addresses;
pub mod confirm;
pub mod drain;
pub mod drift;
pub mod execute;
pub mod observe;
pub mod plan;
pub mod sockets;
pub mod source;
pub mod warnings;
