// Command nmeter stands in for busybox's in images of the node suite: Debian's busybox has none, and tests order what happens by its time in
// milliseconds ("nmeter -d0 %3t").
package main

import (
	"fmt"
	"time"
)

func main() { fmt.Println(time.Now().UTC().Format("15:04:05.000")) }
