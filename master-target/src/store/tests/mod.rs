mod crash;
mod damage;
mod order;
mod world;
