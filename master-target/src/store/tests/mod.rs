mod crash;
mod damage;
mod world;
